"""What the router did: token shares per expert, charts, the report."""
