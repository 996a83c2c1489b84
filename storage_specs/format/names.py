"""Names of the files that lie beside the columns of a store, and how large those that are read at once may be."""

DATASET_FILE = "dataset.json"  # the spec and the totals; written last, so it marks a complete store
MANIFEST_FILE = "manifest.parquet"  # one row for each file of a column
SIGMA_F_FILE = "sigma_f.npy"
Z_SCALE_FILE = "z_scale.npy"  # the step of int8 z in each dimension
COST_FILE = "cost.json"
README_FILE = "README.md"
CROISSANT_FILE = "croissant.json"

COMMITS_FOLDER = "commits"  # one record for each unit
SUM_Z2_FOLDER = "sum_z2"  # Σ z² of each unit
SPEC_FILE = f"{COMMITS_FOLDER}/spec.json"  # written first: says which store is being written here
LEASE_FILE = f"{COMMITS_FOLDER}/driver.json"  # of the driver that writes the store now

MAX_METADATA_BYTES = 1 << 26
