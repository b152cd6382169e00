"""The main job end to end, as a newcomer sees it: `make demo`.

`story` tells it in order, `ward` is the simulated hospital (questions and a reviewer who knows the truth),
`swap` asks without pause while the adapter is replaced, `report` says what came out.
"""
