"""What a compressed model costs in quality and gives in speed, and the report that says so."""
