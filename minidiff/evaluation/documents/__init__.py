"""What stands beside a data set and a model: the audit's page, model card and datasheet."""
