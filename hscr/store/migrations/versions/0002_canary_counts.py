"""what the requests of a canary came to, by gateway copy"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "canary_counts",
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("gateway", sa.String(length=120), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("epoch", "gateway", name=op.f("pk_canary_counts")),
    )


def downgrade() -> None:
    op.drop_table("canary_counts")
