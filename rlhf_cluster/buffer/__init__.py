"""Groups between the services: admission, order, staleness."""
