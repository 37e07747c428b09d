"""The settings of the gateway by role, read from the table in the source."""

import re

from chart import ROOT

ROLES = {"S": "serve", "W": "worker", "P": "provider", "U": "up"}


def by_role():
    """Role → names of its settings."""
    table = (ROOT / "src/config/settings.rs").read_text()
    rows = re.findall(r'^ {4}(\w+) [A-Z]+ "[^"]*" ([A-Z]+)$', table, re.M)
    assert len(rows) > 40, "the table of settings has moved"
    found = {role: set() for role in ROLES.values()}
    for name, letters in rows:
        for letter in "SWPU" if letters == "ALL" else letters:
            found[ROLES[letter]].add(name)
    return found
