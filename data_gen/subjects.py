"""Off-topic subjects, and which of them the detours of training rows may be about."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from esr_train.errors import InputError
from esr_train.models import local_path
from esr_train.recipe import SplitSection
from esr_train.tables import read_rows
from eval.cells import Split, deal_subjects, fingerprint

SUBJECTS = Path(__file__).parent / "prompts" / "subjects.txt"
"""96 subjects; none of the questions shipped beside them is about one."""


def read_subjects(path: str | None) -> list[str]:
    """Off-topic subjects from a file of any kind that prompts may come in; the shipped set for None.

    Raises:
        InputError: naming `file:line`, for a malformed row or a subject that comes twice; for an empty file.
    """
    source = (local_path(path) or path) if path else SUBJECTS
    subjects: dict[str, tuple[str, str]] = {}
    for where, values in read_rows(source, "subject"):
        subject = values["subject"]
        if not isinstance(subject, str) or not subject.strip():
            raise InputError("a subject must be a text that is not empty", where)
        key = fingerprint(subject)
        if key in subjects:
            raise InputError(f"the subject {subject!r} comes twice", where, f"It was at {subjects[key][0]}.")
        subjects[key] = (where, subject.strip())
    if not subjects:
        raise InputError("there is no subject in the file", str(source), "Write one subject a line.")
    return [subject for _, subject in subjects.values()]


def training_subjects(
    subjects: Iterable[str], topics: Mapping[str, Split], held_out: Iterable[str], section: SplitSection
) -> list[str]:
    """The subjects that detours of training rows may be about, in order.

    Args:
        subjects: all of them; a seeded hash deals them to splits, as it deals latents.
        topics: of the prompts, with their splits; a subject that is a topic goes where the topic goes.
        held_out: what evaluation steers towards; a subject that says the same is left out.
        section: shares and seed of the splits.

    Raises:
        InputError: if none is left.
    """
    dealt = deal_subjects(subjects, topics, section)
    taken = {fingerprint(label) for label in held_out} | {
        fingerprint(topic) for topic, split in topics.items() if split != "train"
    }
    chosen = [each for each in subjects if dealt[each] == "train" and fingerprint(each) not in taken]
    if not chosen:
        raise InputError("no subject is left for training", "data.prompted.subjects", "Name a file with more.")
    return chosen
