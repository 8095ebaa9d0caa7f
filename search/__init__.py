"""Exact nearest neighbours at any size, k-means, and the files of rows in which features are kept."""
