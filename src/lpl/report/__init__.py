"""The report page: results of runs, comparisons, evaluations and checks as one HTML file that needs no network."""
