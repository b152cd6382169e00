"""Alembic's entry: runs the migrations on the engine that `Database` hands over, one process at a time."""

from alembic import context

from hscr.store.database import WRITE
from hscr.store.tables import metadata
from hscr.store.writers import migrating

with context.config.attributes["engine"].connect() as connection:
    writer = connection.execution_options(**{WRITE: True})
    with writer.begin():
        migrating(writer)  # the revision is read under the lock: whoever waited finds nothing left to do
        context.configure(connection=writer, target_metadata=metadata, render_as_batch=True)
        context.run_migrations()
