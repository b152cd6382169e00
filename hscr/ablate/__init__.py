"""The paper's ablations (HSCR Tables 3-6) on phantoms: arms that differ in one thing, over seeds."""
