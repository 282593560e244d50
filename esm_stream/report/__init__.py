"""Numbers of a finished merge (JSON first), and the texts drawn from them."""
