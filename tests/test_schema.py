"""The published JSON Schema is that of the code, and real stores follow it."""

import json
from pathlib import Path

import jsonschema
import pytest

from nfm.storage_specs.format.schema import LayoutName, json_schema
from tests.tools.small_run import Run
from tests.tools.stores import LAYOUT_NAMES

SCHEMA = Path(__file__).parent.parent / "docs" / "dataset.schema.json"


def test_the_published_schema_is_that_of_the_code() -> None:
    """After a change of the schema: `python -m nfm.storage_specs.format.schema > docs/dataset.schema.json`."""
    assert json.loads(SCHEMA.read_text()) == json_schema()


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_stores_follow_the_schema(run: Run, layout: LayoutName) -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for url in (run.couplings[layout], f"{run.samples}/train"):
        document = json.loads((Path(url) / "dataset.json").read_text())
        jsonschema.validate(document, schema)
        document["spec"]["rows"] = "many"
        with pytest.raises(jsonschema.ValidationError, match="'many' is not of type 'integer'"):
            jsonschema.validate(document, schema)
