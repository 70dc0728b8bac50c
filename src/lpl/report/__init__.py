"""The report page: what runs, comparisons, evaluations and checks have found, as one HTML file without network."""
