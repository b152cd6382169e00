"""an index of what is due alone: the relay's look takes as long however much was ever sent"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_outbox_sent_at", table_name="outbox")
    due = sa.text("sent_at IS NULL")
    op.create_index("ix_outbox_due", "outbox", ["id"], sqlite_where=due, postgresql_where=due)


def downgrade() -> None:
    op.drop_index("ix_outbox_due", table_name="outbox")
    op.create_index("ix_outbox_sent_at", "outbox", ["sent_at"])
