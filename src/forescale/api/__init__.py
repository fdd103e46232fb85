"""The HTTP interface: requests to models, the management of what is served, and a client for both."""
