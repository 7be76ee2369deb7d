"""Studies: what the library does on real tasks, each in its own folder."""
