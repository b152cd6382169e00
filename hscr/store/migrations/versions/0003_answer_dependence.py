"""visual dependence of single answers"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:

    op.create_table(
        "answer_dependence",
        sa.Column("answer_id", sa.String(length=80), nullable=False),
        sa.Column("dropping", sa.String(length=64), nullable=False),
        sa.Column("study", sa.String(length=100), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["answer_id"], ["answers.id"], name=op.f("fk_answer_dependence_answer_id")),
        sa.PrimaryKeyConstraint("answer_id", "dropping", name=op.f("pk_answer_dependence")),
    )
    with op.batch_alter_table("answer_dependence", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_answer_dependence_created_at"), ["created_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_answer_dependence_study"), ["study"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("answer_dependence", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_answer_dependence_study"))
        batch_op.drop_index(batch_op.f("ix_answer_dependence_created_at"))

    op.drop_table("answer_dependence")
