/* All there is in an image: a program without a C library beside it, for the tests of the init. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

static void upper(int in, int out) {
    char piece[4096];
    long got;
    while ((got = read(in, piece, sizeof piece)) > 0) {
        for (long i = 0; i < got; i++)
            if (piece[i] >= 'a' && piece[i] <= 'z') piece[i] -= 32;
        if (write(out, piece, got) != got) exit(9);
    }
}

static void line(const char *path) {
    char text[256];
    FILE *file = fopen(path, "r");
    printf("%s=%s\n", path, file && fgets(text, sizeof text, file) ? strtok(text, "\n") : "?");
}

static void report(void) {
    char where[256];
    struct statvfs tmp;
    printf("uid=%d gid=%d cwd=%s\n", getuid(), getgid(), getcwd(where, sizeof where));
    printf("greeting=%s home=%s path=%s\n", getenv("GREETING"), getenv("HOME"), getenv("PATH"));
    printf("root=%s\n", open("/file", O_CREAT | O_WRONLY, 0600) < 0 ? strerror(errno) : "writable");
    printf("tmp=%s\n", open("/tmp/file", O_CREAT | O_WRONLY, 0600) < 0 ? strerror(errno) : "writable");
    printf("bounded=%d\n", !statvfs("/tmp", &tmp) && tmp.f_blocks > 0);
    line("/proc/1/comm");
    line("/sys/class/net/lo/operstate");
    line("/dev/shm/../../proc/self/comm");
    fflush(stdout);
}

static void serve(int port) {
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 8)) exit(8);
    for (;;) {
        char head[65536];
        int sock = accept(listener, 0, 0);
        if (read(sock, head, sizeof head) > 0)
            dprintf(sock, "HTTP/1.1 200 OK\r\nserver: tiny\r\n\r\nserved by pid %d", getpid() > 1);
        close(sock);
    }
}

int main(int count, char **arguments) {
    const char *verb = count > 1 ? arguments[1] : "";
    if (!strcmp(verb, "upper")) upper(0, 1);
    if (!strcmp(verb, "report")) report();
    if (!strcmp(verb, "serve")) serve(atoi(getenv("PORT")));
    if (!strcmp(verb, "fail")) return fprintf(stderr, "it is broken\n"), 3;
    if (!strcmp(verb, "orphan") && !fork()) return setsid(), close(1), close(2), 0;
    return 0;
}
