"""What a submodel folder holds, without torch: names, the index map and how it gathers and scatters, the report."""
