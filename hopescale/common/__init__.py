"""What every floor may use: errors, logging, units, paths. Knows nothing of the rest and imports no torch."""
