"""The bench, ``python -m bench COMMAND``: workloads, providers, one instrument a quantity, CSV, plots of the CSV."""
