"""Pages to look at: one file each that opens without a network, with pictures and tables that answer."""
