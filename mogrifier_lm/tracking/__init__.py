"""All of Weights & Biases: runs, the summary of a sweep, dashboards."""
