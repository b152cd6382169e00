"""A generation run over a data set: shards that are complete or absent, and what was learned of them."""
