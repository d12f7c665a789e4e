"""What groups, labels and settings of devices may be called. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from appliance.core.errors import InvalidRequestError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MOST_GROUPS = 32
MOST_LABELS = 32
LONGEST_VALUE = 200


def check_groups(groups: Iterable[str]) -> None:
    """Refuse names that will not do.

    Raises:
        InvalidRequestError: It names the group.
    """
    names = list(groups)
    for name in names:
        _check_name("group", name)
    if len(names) > MOST_GROUPS:
        raise InvalidRequestError(f"A device is in at most {MOST_GROUPS} groups, not {len(names)}.", param="groups")


def check_labels(labels: Mapping[str, str | None]) -> None:
    """Refuse names and values that will not do.

    Raises:
        InvalidRequestError: It names the label.
    """
    for name, value in labels.items():
        _check_name("label", name)
        if value is not None and not (len(value) <= LONGEST_VALUE and value.isprintable()):
            raise InvalidRequestError(
                f"The label {name!r} has a value that will not do.",
                advice=f"Use up to {LONGEST_VALUE} visible characters.",
                param="labels",
            )
    if len(labels) > MOST_LABELS:
        raise InvalidRequestError(f"A device has at most {MOST_LABELS} labels, not {len(labels)}.", param="labels")


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:100]!r} will not do as the name of a {what}.",
            advice="Use up to 63 small letters, digits, dots, dashes and underscores.",
            param=f"{what}s",
        )
