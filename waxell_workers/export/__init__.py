"""Exporters: what takes batches from the shipper to a destination. Imported by the shipper alone."""
