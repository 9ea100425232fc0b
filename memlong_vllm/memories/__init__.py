"""Named memories on disk: chunks that outlive the sequence they came from."""
