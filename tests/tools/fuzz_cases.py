"""What a seed stands for: a sound folder, and some changes to it."""

from dataclasses import dataclass, field
from random import Random

from tests.tools.fuzz_files import Files
from tests.tools.fuzz_mutations import mutate_attribution, mutate_content, mutate_place, mutate_spec
from tests.tools.fuzz_seals import seal
from tests.tools.fuzz_subjects import Subject, Subjects, subject_names

MODEL_ROLES = ("teacher", "student")


@dataclass
class Case:
    """What a seed stands for."""

    seed: int
    name: str
    subject: Subject
    files: Files
    changes: list[str] = field(default_factory=list)
    sealed: bool = False


def make_case(seed: int, subjects: Subjects) -> Case:
    """The case of a seed."""
    rng = Random(seed)
    name = rng.choice(subject_names())
    subject = subjects(name)
    case = Case(seed, name, subject, dict(subject.files))
    if subject.role != "cache":  # whose files are there when it was filled
        change_case(rng, case)
    return case


def change_case(rng: Random, case: Case) -> None:
    """Make one to three changes, and the hashes agree with them, or not."""
    files = case.files
    if case.subject.role in MODEL_ROLES:
        files = {f"{case.subject.role}.safetensors": case.files[f"{case.subject.role}.safetensors"]}
    is_store = "commits/spec.json" in files or "manifest.parquet" in files
    respecify = False
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.choices(["content", "place", "spec", "attribution"], [55, 20, 15 * is_store, 5 * is_store])[0]
        if not files:
            break
        if kind == "spec" and (change := mutate_spec(rng, files)):
            respecify = True
        elif kind == "attribution" and (change := mutate_attribution(rng, files)):
            pass
        elif kind == "place":
            change = mutate_place(rng, files)
        elif any(isinstance(entry, bytes) for entry in files.values()):
            change = mutate_content(rng, files)
        else:
            break
        case.changes.append(change)
    if case.subject.role in MODEL_ROLES:
        case.files = {path: data for path, data in case.files.items() if not path.startswith(case.subject.role)} | files
    if is_store and (respecify or rng.random() < 0.65):
        seal(files, commits=rng.random() < 0.5, respecify=respecify)
        case.sealed = True
