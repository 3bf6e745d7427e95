"""The contributor's side: the queue of patches as commits in a git repository, and back."""
