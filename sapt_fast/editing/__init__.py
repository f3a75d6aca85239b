"""Sequential model editing: edits as data, runs that resume, metrics by generation, baselines."""
