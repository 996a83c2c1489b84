"""Names of the files that lie beside the columns of a store, and how large those that are read whole may be."""

SPEC_FILE = "commits/spec.json"  # written first: whose store this will be
LEASE_FILE = "commits/driver.json"  # of the driver that writes the store now
Z_SCALE_FILE = "z_scale.npy"
MAX_METADATA_BYTES = 1 << 26
