"""Writing stores, unit by unit, and moving whole stores to another place or layout."""
