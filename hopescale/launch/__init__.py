"""Starting the processes of a run, and telling each which one it is. Imports no torch."""
