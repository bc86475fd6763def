import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;

/** `java Decode.java URL LATENT IMAGE length|chunked` posts a raw latent and prints status, version and length. */
public class Decode {
    public static void main(String[] arguments) throws Exception {
        byte[] latent = Files.readAllBytes(Path.of(arguments[1]));
        BodyPublisher body = arguments[3].equals("chunked")
            ? BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(latent))
            : BodyPublishers.ofByteArray(latent);
        var request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .header("Content-Type", "application/octet-stream")
            .POST(body)
            .build();
        // The default client prefers HTTP/2: over http it offers an upgrade to h2c with each first request.
        var client = HttpClient.newHttpClient();
        var response = client.send(request, BodyHandlers.ofFile(Path.of(arguments[2])));
        System.out.println(response.statusCode() + " " + response.version());
    }
}
