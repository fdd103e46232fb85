"""Durable state: models, their versions and files, what is to be deployed, and everything that happened."""
