"""Training: the loop, optimisers, schedule, guard and journal."""
