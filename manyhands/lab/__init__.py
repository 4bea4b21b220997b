"""The lab: what two documents claim of mixtures of experts, and experiments that show it or do not."""
