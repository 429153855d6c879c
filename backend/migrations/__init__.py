"""How the database came to be as it is, one step after the other."""

# All steps, oldest first. The service knows by this list, without Alembic, whether one is to do.
REVISIONS = ("0001", "0002")
VERSION_TABLE = "crane_version"  # not Alembic's name for it: the database may have other tenants
