"""From arrays to the files of a store, unit by unit; and whole stores from one place or layout to another."""
