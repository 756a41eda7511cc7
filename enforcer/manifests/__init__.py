"""A directory of manifests as a source: its files watched, read, and decoded as the API's objects are."""
