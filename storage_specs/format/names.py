"""Names of the files that lie beside the columns of a store, and how large those that are read at once may be."""

DATASET_FILE = "dataset.json"  # the newest version of the store; written last, so it marks a complete store
VERSIONS_FOLDER = "versions"  # versions/0001.json and versions/0001/ with the files of version 1, and so on
TAGS_FOLDER = "tags"  # a name for a version in each file
Z_SCALE_FILE = "z_scale.npy"  # the step of int8 z in each dimension; the same in all versions
COST_FILE = "cost.json"
README_FILE = "README.md"  # that of the newest version
CROISSANT_FILE = "croissant.json"  # that of the newest version

# Names of files in the folder of a version.
MANIFEST_NAME = "manifest.parquet"  # one row for each file of a column
NAMES_NAME = "names.parquet"  # where each image comes from
SIGMA_F_NAME = "sigma_f.npy"
Z_SUMS_NAME = "z_sums.npy"
Z_CLASS_SUMS_NAME = "z_class_sums.npy"

COMMITS_FOLDER = "commits"  # one record for each unit
SUMS_FOLDER = "sums"  # what is added up when the store is completed: sums over z, and the names of images
SPEC_FILE = f"{COMMITS_FOLDER}/spec.json"  # written first: says which store is being written here
LEASE_FILE = f"{COMMITS_FOLDER}/driver.json"  # of the driver that writes the store now
COPY_FILE = "copy.json"  # in an unfinished copy: which store it is of
EXPORT_FILE = "export.json"  # in a folder of tuples: which store they are from

MAX_VERSION = 1_000_000
MAX_METADATA_BYTES = 1 << 26  # of a JSON document
MAX_CARD_BYTES = 1 << 28  # croissant.json has a record for each of up to a million classes
MAX_DOCUMENT_BYTES = 1 << 30  # of any file beside those of columns; a larger one is damaged or hostile


def version_file(version: int) -> str:
    """Path of the document of a version."""
    return f"{VERSIONS_FOLDER}/{version:04d}.json"


def version_folder(version: int) -> str:
    """Path of the folder with the files of a version."""
    return f"{VERSIONS_FOLDER}/{version:04d}"
