"""`lpl export`: results in the forms that other programs read."""
