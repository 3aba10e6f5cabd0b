"""Numbers of documents that no key or query of a document has."""

NO_RUN = -1  # of a key that no query sees
NO_QUERY = -2  # of a query that sees nothing: not equal to `NO_RUN`
