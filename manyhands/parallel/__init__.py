"""Several processes as one: who sums, who decides. Always an argument, never a global."""
