"""Everything that runs, reads, writes or measures."""
