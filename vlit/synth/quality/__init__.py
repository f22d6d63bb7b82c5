"""Quality of instruction data: metrics a record, figures a dataset, filters, selection. See docs/data-quality.md."""
