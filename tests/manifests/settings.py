"""The settings of the gateway by role, read from the table in the source."""

import re

from chart import ROOT

ROLES = ("serve", "worker", "provider", "up")


def by_role():
    """Role → names of its settings."""
    table = (ROOT / "src/config/settings.rs").read_text()
    rows = re.findall(r'^ {4}(\w+) [A-Z]+ "[^"]*" ([A-Z_]+)$', table, re.M)
    assert len(rows) > 40, "the table of settings has moved"
    found = {role: set() for role in ROLES}
    for name, roles in rows:
        for role in ROLES if roles == "ALL_ROLES" else roles.lower().split("_"):
            found[role].add(name)
    return found
