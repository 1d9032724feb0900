"""Whether a folder may take a study: its own, extended or cut, but not another one's. No torch."""

from __future__ import annotations

from pathlib import Path

from disco.errors import UserError
from disco.sweep.record import read_plan
from disco.sweep.study import Study, scan_key


def check_folder(study: Study, out: Path) -> tuple[str, ...]:
    """Makes sure that ``out`` holds no other study, whose plan would be replaced.

    The same study has the same name and at least one run in common; an adaptive one, whose runs are not known
    beforehand, one that differs in learning rate, batch and horizon only.

    Returns:
        Notes: whether runs of the plan in ``out`` are no longer in this one.

    Raises:
        UserError: it holds another one.
    """
    try:
        old = read_plan(out)
    except UserError:  # no plan, or one that is damaged: the study's own takes its place
        return ()
    if old.name != study.name:
        raise UserError(
            f"{out} holds the study {old.name!r}, not {study.name!r}; give another --out, or the file that name"
        )
    key = scan_key if study.adaptive else (lambda config: config.id)
    new = {key(config) for config in study.runs}
    left = [config for config in old.runs if key(config) not in new]
    if len(left) == len(old.runs) > 0:
        raise UserError(
            f"{out} holds another study named {old.name!r}: none of its {len(left)} runs is in this one; "
            "give another --out, or the file another name"
        )
    return (f"{len(left)} runs of the plan in {out} are not in this one; their records stay",) if left else ()
