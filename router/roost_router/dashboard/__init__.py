"""The dashboard: a page of the admin port."""
