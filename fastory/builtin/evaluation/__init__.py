"""How good the built-in model is: the judge, and the tables of both modes on held-out stories."""
