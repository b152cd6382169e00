"""Judging a version by what it answers: suites of questions, scores, a paired interval, a verdict.

Nothing here knows an engine or a database: whoever judges hands in a function that answers one item.
"""
