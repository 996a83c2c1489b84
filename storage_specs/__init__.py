"""What a store is: schema, files, layouts, writer, reader, order. No torch model, no ray."""
