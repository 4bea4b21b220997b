"""The recipes of CONTRIBUTING.md, as edits of a copy of the tree and a check that runs in it."""
